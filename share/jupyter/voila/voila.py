"""How `make explorer` serves the page: every option of Voila that is the same in each call.
Voila reads this file as its configuration."""
c = get_config() # noqa: F821 - given by the reader of this file

# Only this machine reaches the page, and only with the token of the printed address, which plain
# Voila does not ask for. No file beside the notebook is served.
c.Voila.ip = "127.0.0.1"
c.Voila.auto_token = True
c.Voila.open_browser = False
c.VoilaConfiguration.file_denylist = [".*"]

# The page is the same whatever its address says. Voila would write a `theme` from the address into
# the page as it is, markup and scripts included.
c.VoilaConfiguration.template = "explorer"
c.VoilaConfiguration.allow_template_override = "NO"
c.VoilaConfiguration.allow_theme_override = "NO"
c.VoilaConfiguration.strip_sources = True
c.VoilaConfiguration.show_tracebacks = False

# The page says itself what it needs; what the notebook says to its readers is left out.
c.TagRemovePreprocessor.enabled = True
c.TagRemovePreprocessor.remove_cell_tags = {"prose"}

# One page is kept warm, so that it opens at once. All of them together are bounded in number.
c.VoilaConfiguration.multi_kernel_manager_class = "transporter_nb.app.server.LimitedKernelManager"
c.VoilaConfiguration.preheat_kernel = True
c.VoilaConfiguration.default_pool_size = 1

# A page that is left ends its kernel: its goodbye carries no _xsrf, so that check is off and the
# kernel's unguessable name must do. Where the goodbye is lost, the kernel ends after an hour.
c.Voila.tornado_settings = {"disable_check_xsrf": True}
c.LimitedKernelManager.cull_interval = 300 # seconds
c.LimitedKernelManager.cull_idle_timeout = 3600 # seconds
