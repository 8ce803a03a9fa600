"""Files on disk: reading files from strangers, publishing our own, locks. Of sdrt it imports only `errors`."""
