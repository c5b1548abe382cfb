"""The test track: `headwise bench attention`. Imports the rooms it measures; nothing imports it but the command line."""
