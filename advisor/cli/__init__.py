"""One file per command: converts arguments, calls the API, prints."""
