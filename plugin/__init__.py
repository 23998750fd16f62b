"""The driver: backing images, volumes, LUKS2 and the machine under them. It knows no gRPC."""
