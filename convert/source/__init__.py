"""The checkpoint that is converted: a local folder or a repository of the Hub, read with suspicion."""
