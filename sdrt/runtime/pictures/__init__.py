"""Pictures in and out: canvases, files and their text, contact sheets."""
