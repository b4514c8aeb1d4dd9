"""What does the model write under a perturbation?"""
