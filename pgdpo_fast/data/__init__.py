"""From video pairs on disk to the latents a trainer reads: manifests, decoding, codecs, text, stores, demo clips."""
