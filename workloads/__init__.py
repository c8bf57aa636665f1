"""Who asks for what, and when: requests, adapters, arrivals, popularity, lengths, traces."""
