"""From video pairs on disk to latents a trainer reads: manifests, decoding, codecs, text encoders, stores, demo clips."""
