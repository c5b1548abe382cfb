"""The test track: `headwise bench`. Imports the rooms it measures; nothing imports it but the command line."""
