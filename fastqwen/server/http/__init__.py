"""The front: a port, who may ask, what a request may weigh, and how answers and errors go out. Knows no model."""
