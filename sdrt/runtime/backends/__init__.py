"""A folder for each library that runs engines."""
