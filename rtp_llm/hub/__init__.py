"""Models by name: `org/name` on a Hugging Face hub, its cache on this machine, and the download between them."""
