"""From the text of a prompt to the input of the network: syntax, chunks, tokens, contexts."""
