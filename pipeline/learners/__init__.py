"""Meta-learners: each maps a support set to a classifier. One published learner a file."""
