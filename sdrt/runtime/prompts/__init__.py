"""From a prompt's text to what the network is given: syntax, chunks, tokens, contexts."""
