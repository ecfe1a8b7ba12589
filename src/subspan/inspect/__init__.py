"""What a model looks like: spectra, effective ranks, figures and reports."""

from subspan.inspect.plots import Style as Style
from subspan.inspect.plots import loss_curves as loss_curves
from subspan.inspect.plots import perplexity_figure as perplexity_figure
from subspan.inspect.plots import rank_heatmap as rank_heatmap
from subspan.inspect.plots import spectra_figure as spectra_figure
from subspan.inspect.plots import styles as styles
from subspan.inspect.report import Report as Report
from subspan.inspect.report import environment as environment
from subspan.inspect.survey import Survey as Survey
from subspan.inspect.survey import SurveyRow as SurveyRow
from subspan.inspect.survey import TypeMeans as TypeMeans
from subspan.inspect.survey import parse_site as parse_site
from subspan.inspect.survey import survey as survey
