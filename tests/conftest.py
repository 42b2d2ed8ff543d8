import torch

# Test processes run side by side: one thread each is the fastest.
torch.set_num_threads(1)
