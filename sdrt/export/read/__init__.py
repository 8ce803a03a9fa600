"""Reading what people download: safetensors, torch files, diffusers folders. Pickles are read as data."""
