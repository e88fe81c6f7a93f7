"""`python -m transporter_nb.doctor`: the command; what it does is in `app.doctor`"""
from .app.doctor import main

if __name__ == "__main__": raise SystemExit(main())
