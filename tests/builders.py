"""What do several test files make in the same way?"""

from melbo_lens.ascent.objectives import Objective
from melbo_lens.ascent.states import Evaluation
from melbo_lens.methods.problem import Problem, bias


def vector_problem(sliced, p=2.0, q=1.0, batch_size=64, diversity=0.0):
    """What `fit_vectors` climbs on a slice."""
    return Problem(sliced, bias(sliced), Objective(p=p, q=q).value, batch_size, diversity)


def of_vectors(sliced, *settings):
    """The function from vectors [row d_model] to their objective and gradient."""
    problem = vector_problem(sliced, *settings)

    def evaluate(theta):
        seen = problem((theta[None],))
        return seen.value[0], seen.gradient[0][0]

    return evaluate


def as_evaluate(function):
    """A function of rows [row d_model], giving values and gradients, as an ascent takes it."""

    def evaluate(point, first=0):
        rows = point[0][:, first:]
        value, gradient = function(rows.flatten(0, 1))
        value = value.view(rows.shape[:2])
        return Evaluation(value, value, (gradient.view(rows.shape),))

    return evaluate
