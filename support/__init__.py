"""What all commands lean on, and none of the method: files, pictures, errors, the toy world."""
