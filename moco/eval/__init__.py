"""What is asked of an encoder: k-NN, few-shot episodes, retrieval, embeddings, linear probe, fine-tuning."""
