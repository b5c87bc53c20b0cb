"""An evaluation for a person: tables on the screen, pictures, and a page that holds both."""
