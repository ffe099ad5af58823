"""Files of the host: what is read, what is named inside images, what is written."""
