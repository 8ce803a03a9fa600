"""The bundle: the contract between the half that exports and the half that runs. Standard library only."""
