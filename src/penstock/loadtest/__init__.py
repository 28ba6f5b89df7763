"""Load tests of engines, the router and the client: the same requests through each, and what each adds."""
