"""What this machine is and has: its installed packages. Imports nothing of sdrt but `errors`."""
