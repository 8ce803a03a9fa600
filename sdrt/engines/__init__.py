"""What an engine is, where engines lie in a bundle, and one row for each target."""
