"""Bridges to other curvature libraries, which are imported only here, where they are used."""
