"""Meta-learning, tracked: a map of the floors. Imports point down only.

Floor 5, commands: train, sweep, evaluate, adapt, register, report, survey, demo, ui; each a
    `run(cfg)` behind cli; study (what a sweep is made of; nothing else imports optuna), demo_page
    (that of demo; nothing else imports gradio).
Floor 4, runs: compose, signature, keys, sources, trainer and config (configurations to parts),
    checkpoints, stored (configurations found in files), scoreboard (learners on test sets), tables
    (of the results), seen (what training saw, which no test may hold), processes (of one run),
    reporting (what a run leaves behind), inside (pictures of what a tested learner does), trained
    (a learner to use), classifier (it, adapted to photos), adapted and
    adapted_pictures (what that leaves behind),
    serving and serving_learner (what MLflow runs of them), onnx_export, contact_sheet, tested,
    leaderboard, sections, html, pages (from tested runs to a report), plan, overview (of a survey),
    trial and uploads (what the page of demo does), tracking (MLflow; nothing else imports it).
Floor 3, learning: learners (support set to classifier, Lightning modules), progress.
Floor 2, loading: data.loaders, data.datamodule (three class-disjoint splits to three loaders),
    data.regression (a family of functions to the same).
Floor 1, material: blocks, backbones and pretrained (networks), heads (classifiers of fixed
    embeddings), engine (how the tasks of a meta-batch are run), metrics, figures, inside_figures,
    plots; data (image pools, class splits, episodes, a user's photos).
Floor 0, words: episode (the shapes of a task), functional (pure maths), inner (inner loops and
    their rules), solvers (linear classifiers in closed form or to convergence), paired (statistics
    of learners on the same episodes), calibration (whether confidences can be believed),
    annotations, errors.
"""
