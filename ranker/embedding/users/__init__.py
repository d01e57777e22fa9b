"""One vector for each user, from the order of the user's last actions (Pancha et al., "PinnerFormer", KDD 2022)."""
