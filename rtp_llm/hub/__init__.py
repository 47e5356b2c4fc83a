"""Models named `org/name`: the Hugging Face hub, its cache on this machine, and the download from one to the other."""
