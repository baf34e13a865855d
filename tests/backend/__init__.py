"""The backend as torch.compile calls it."""
