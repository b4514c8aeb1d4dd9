"""Do the published results hold?"""
