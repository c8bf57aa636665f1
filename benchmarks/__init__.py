"""Every performance figure that the project states, one command each."""
