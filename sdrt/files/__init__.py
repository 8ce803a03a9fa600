"""Files on disk: reading what strangers give, publishing what we write, locks. Imports nothing of sdrt but `errors`."""
