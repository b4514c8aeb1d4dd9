"""Do the published results hold?  `reproduction` runs the experiments on the organisms and judges the results."""
