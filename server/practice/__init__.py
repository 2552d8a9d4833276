"""Practice: repeated attempts at tasks of the owner's making, which no customer sees."""
