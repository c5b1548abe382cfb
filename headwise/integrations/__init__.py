"""headwise inside other libraries. Nothing imports this room; each of its modules needs the library it is named after."""
