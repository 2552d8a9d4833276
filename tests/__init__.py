"""One folder a room; what several files of a room share is a module of its own beside them."""
