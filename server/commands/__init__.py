"""What the commands of `hone` do; their names, flags and help are in `server.cli`."""
