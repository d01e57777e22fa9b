"""Which version answers under which label: following the model store, judging, rolling back."""
