"""What annotation tools write, as images, index masks and classes."""
