"""Where facts are looked up: linear probes, path patching, and the rules that read them."""
