"""The wire: CSI's services over gRPC. A servicer validates, makes one call into `plugin`, and maps the answer."""
