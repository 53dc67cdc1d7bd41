// Before the first paint, or a chosen theme would flash in after the other one.
{
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
}
