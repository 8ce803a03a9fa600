"""The `sdrt` command, a file a command. Its files alone print and exit."""
