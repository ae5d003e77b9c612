"""From a file, bytes or an array to what the encoder takes: `read` makes a Radiograph, `transform` makes Pixels."""
