"""Messages between server and sites, and the transport that carries them."""
