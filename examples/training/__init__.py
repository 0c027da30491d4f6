"""Parts of examples/train_cifar10.py: recipes, images, the run and its checkpoints, what is shown and written."""
