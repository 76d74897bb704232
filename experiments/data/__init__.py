"""Text data: corpora, text sets of TensorFlow Datasets, and a Grain pipeline that packs them."""
