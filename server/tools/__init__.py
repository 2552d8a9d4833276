"""What an agent may do: operations, MCP servers, functions and code of its own, behind one box.

Everything a tool can do wrong ends here as a `ToolResult`. The rooms around it, the agent's loop
and the record, never see a tool's exception.
"""
