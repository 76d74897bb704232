"""Where the bytes come from: corpora, TFDS text sets, and the Grain pipeline that packs them."""
